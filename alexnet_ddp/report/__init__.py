"""Writes report.html of a run or a sweep: one file without external resources.

- command: reads the run, and computes what needs its weights and images; page: renders the template
- charts: charts as SVG; curves: the charts of runs; timeline: starts, stops, saves; times:
  the parts of a step
- images: one pass over validation images, and pictures; activation: class activation maps;
  classes: confusion matrix, worst classes
- facts: headline numbers, data, options, environment
- sweep: the page of a sweep

page.html.j2 and sweep.html.j2 fill base.html.j2 with the macros of parts.html.j2. page.css and
page.js are inlined into the file.
"""
