"""The rules of canonicalize: identities of tensors, one theme a file."""
