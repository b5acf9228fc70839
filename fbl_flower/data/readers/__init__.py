"""One module for each form in which data sets come; all return a `Source`."""
