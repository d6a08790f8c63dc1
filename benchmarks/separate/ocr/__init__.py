"""Networks that others have trained, made separable: EasyOCR's recogniser and its detector, on rendered words."""
