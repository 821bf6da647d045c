#!lua flags=allow-oom
-- adopt: put an envelope of ours in the place of an entry that another program wrote, with a live record.
-- ARGV[1] stream  ARGV[2] group  ARGV[3] entry  ARGV[4] delivery count  ARGV[5] consumer  ARGV[6] job id
-- ARGV[7] tail (envelope without its head)  ARGV[8] tenant  ARGV[9] deadline_ms  ARGV[10] target stream
-- Returns: time (us), 'adopted' | 'lost' | 'duplicate' (a living job has this id; nothing was changed).
-- Invariant: one job per id; an entry is adopted once, by its owner.
local now_us = clock_us()
local id = ARGV[6]
local owner, count = pending(ARGV[1], ARGV[2], ARGV[3])
if owner ~= ARGV[5] or count ~= tonumber(ARGV[4]) then return {digits(now_us), 'lost'} end
if call('EXISTS', KEY.live .. id, KEY.completion .. id) > 0 then return {digits(now_us), 'duplicate'} end
check_accept()
check_type(ARGV[10], 'stream')
remove(ARGV[1], ARGV[2], ARGV[3])
accept(id, ARGV[7], ARGV[10], ARGV[8], ARGV[9], 0, now_us, {'deadline', ARGV[9]})
conclude()
return {digits(now_us), 'adopted'}
