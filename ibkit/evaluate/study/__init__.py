"""People, or simulated raters, compare the methods' pictures: items, votes, files of ratings, the page; notebook 07."""
