"""Django database engines whose connections are shared by all worker processes."""
