"""The drift report for people: one page, markdown, terminal tables and plots, all from the content of drift.json."""
