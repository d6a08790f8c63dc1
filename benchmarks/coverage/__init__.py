"""How much of each of many models sepc compiles, whether it is right, and what it gains."""
