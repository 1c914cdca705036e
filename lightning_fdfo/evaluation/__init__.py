"""Images without churn, their scores, and the numbers by which two models are compared."""
