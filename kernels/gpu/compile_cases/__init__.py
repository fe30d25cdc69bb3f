"""Problems to compile every kernel for, ahead of time: one module for each module of kernels."""
