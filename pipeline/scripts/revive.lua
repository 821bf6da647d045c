#!lua
-- revive: start a dead letter's job again, as a new job, and take the letter away.
-- ARGV[1] letter id  ARGV[2] job id  ARGV[3] tail (envelope without its head)  ARGV[4] stream  ARGV[5] tenant
-- ARGV[6] deadline_ms  ARGV[7] its record (see prelude)
-- Returns: 'revived' | 'unknown' (no such letter: another retry was quicker) | 'duplicate' (the id is taken).
-- Invariant: a letter is revived once, however many try at the same time.
if call('EXISTS', KEY.live .. ARGV[2], KEY.completion .. ARGV[2]) > 0 then return 'duplicate' end
check_accept()
check_type(ARGV[4], 'stream')
if ARGV[7] ~= '' then check_type(KEY.events, 'stream') end
if call('XDEL', KEY.dead, ARGV[1]) == 0 then return 'unknown' end
local more = {'deadline', ARGV[6]}
note_record(more, ARGV[2], ARGV[5], ARGV[7], clock_us())
accept(ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], 0, clock_us(), more)
conclude()
return 'revived'
