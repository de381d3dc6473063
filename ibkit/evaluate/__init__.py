"""Pictures of each arm, their scores, statistics, tables, claims and people's judgement."""
