"""The programs that come with sepc; each is a module with a `main`."""

MODEL_FORMS = "a .pt2 file, timm:NAME, torchvision:NAME or path/file.py:FUNCTION"
"""What names a model on the command line."""
