#!lua
-- recall: put the event of a dead letter back among those to be written, and take the letter away.
-- ARGV[1] letter id  then the event's names and values
-- Returns: 'recalled' | 'unknown' (no such letter: another retry was quicker).
-- Invariant: a letter is recalled once, however many try at the same time.
check_type(KEY.events, 'stream')
if call('XDEL', KEY.dead, ARGV[1]) == 0 then return 'unknown' end
call('XADD', KEY.events, '*', unpack(ARGV, 2))
return 'recalled'
