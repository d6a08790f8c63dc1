"""The programs that come with sepc; each is a module with a `main`."""
