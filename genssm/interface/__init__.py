"""The page: one file a tab, what the tabs share, and the scripts that draw in the browser."""
