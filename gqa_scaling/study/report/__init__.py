"""How a study is shown: its tables, sentences and pictures, on a terminal and on one page."""
