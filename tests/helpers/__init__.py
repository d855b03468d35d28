"""What the tests share: real servers, real processes, pipes that order them."""
