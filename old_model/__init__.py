"""What an old model leaves behind for the training of a new one: its files, read and checked."""
