"""transformers' InternVL classes, and what we put on them."""
