"""What replaces other libraries' own pools, each under the name that its users know: change one import."""
