"""What works through a recipe's prompts without training: trajectories into stores, images into folders, a teacher's
answers, the tasks of the evaluation harness."""
