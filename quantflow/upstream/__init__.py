"""Private names of torch and executorch that quantflow replaces for a while, one concern a file."""
