"""Render a run folder as one HTML page, RUN/report.html, and draw the figures of all pages.

In: a run folder (decomposition, metrics.json, subnetworks.json, config.yaml), or plain lists of numbers. Out: the
page's text, matplotlib figures, SVG and PNG files. Read first: report.py.
"""
