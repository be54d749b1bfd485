"""What teachers were asked, what they answered, and what it cost."""
