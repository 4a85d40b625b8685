//! The real program, started as a runtime starts it, beside an agent that the test plays.

mod add;
mod answers;
mod world;
