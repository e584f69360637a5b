"""Where a call of attention is intercepted: transformers' interface, or torch's SDPA inside a marked module."""
