"""Which row of the student stands beside which row of the teacher."""
