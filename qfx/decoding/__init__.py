"""Exported models that write token after token: their caches, and transformers' `generate()` over them."""
