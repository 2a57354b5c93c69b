"""AdaRound: learned rounding of weights, by layer or by block (arXiv:2004.10568, arXiv:2102.05426)."""
