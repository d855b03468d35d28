"""One file per facility of the kernel. Each returns Python values, raises our errors, and says who owns each descriptor."""
