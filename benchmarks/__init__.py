"""Scripts, one for each figure that the documents quote, and what they share."""
