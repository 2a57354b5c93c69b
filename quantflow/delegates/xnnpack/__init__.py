"""XNNPACK: what it takes, how a program is partitioned for it, and what is written in other operators."""
