"""What the exit codes mean."""

CHECK_FAILED, USAGE, CAN_NOT = 1, 2, 3
