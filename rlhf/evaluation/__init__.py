"""What a judge sees: answers, scores, and how sure one can be of a difference.

Knows models that answer, rewards that judge, and statistics. Must not know how a model was trained, nor change it.

Read in this order: answers (sampled, kept, measured, judged), statistics (intervals, calibration, ROUGE, ranks),
tables (the numbers by model and dataset, sample files: a new number starts there), people (votes as a judge), report
(how they are shown: report.md, the terminal), picture (report.png), page (report.html, with its template, style and
scripts: to read all answers, and to judge them), generation_metric (ROUGE of generated answers during SFT).
"""
