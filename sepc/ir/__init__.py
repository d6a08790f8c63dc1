"""The intermediate representation: torch.fx graphs of ATen ops, their typed accessors, printer and verifier."""
