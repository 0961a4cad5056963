"""The page at `/`: a form of a bundle's columns, which scores a row by hand. It needs nothing from elsewhere."""

PAGE = ""
