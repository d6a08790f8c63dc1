"""Running compiled models, and the files they are kept in. Neither TVM nor the passes are needed here."""
