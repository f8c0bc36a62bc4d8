"""The old model's files that the training of a new one needs: named, read and checked."""
