"""What a program takes and returns."""
