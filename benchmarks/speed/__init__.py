"""What `suite.py` measures, how it is recorded, and how the page is made of the records."""
