"""The prompts: one file for each way to make rows that stand in front of every text."""
