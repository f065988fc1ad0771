"""Passes over graphs of this backend's ops, one idea a file."""
