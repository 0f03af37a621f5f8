"""From a run folder to tables and a page."""
