"""A compiled model as C sources with an object file and a file of weights, which need nothing of sepc or Python."""
