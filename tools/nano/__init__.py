"""How the nano model and its starter set are made: concepts, scenes, drawing, jokes."""
