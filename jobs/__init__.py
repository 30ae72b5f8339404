"""Commands: each file reads its configuration, runs a plan and prints what came of it."""
