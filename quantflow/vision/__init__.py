"""Image classifiers and images, for commands and recipes. Needs torchvision: ``pip install "quantflow[recipes]"``."""
