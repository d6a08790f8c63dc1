"""What the cost model predicts against what is measured: bytes, tilings, fusion, memory."""
