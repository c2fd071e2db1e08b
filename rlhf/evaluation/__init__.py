"""What a judge sees: answers, scores, and how sure one can be of a difference.

Knows models that answer, rewards that judge, and statistics. Must not know how a model was trained, nor change it.

Read in this order: answers (sampled, kept, measured, judged), statistics (intervals, calibration, ROUGE, ranks),
tables (the figures by model and dataset, sample files), report (report.md, report.png, the terminal; a new figure
starts in tables and is shown here), generation_metric (ROUGE of generated answers during SFT).
"""
