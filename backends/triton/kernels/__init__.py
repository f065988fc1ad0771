"""The kernels in Triton's language. Importing one of these modules needs Triton."""
