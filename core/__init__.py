"""The ground floor: errors, ranks and devices, configs, files. Imports nothing of the repo but itself."""
