"""The ground floor: errors, ranks and devices, configs, files. Imports no other package of the repo."""
