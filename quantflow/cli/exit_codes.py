"""The exit codes of the commands."""

CHECK_FAILED, USAGE, CAN_NOT = 1, 2, 3
