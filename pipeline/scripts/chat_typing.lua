#!lua
-- chat_typing: somebody is typing: what waits in the chat is taken a little later.
-- ARGV[1] chat (as it stands in keys)
-- Returns: time (us), messages that wait.
local now_us = clock_us()
local about = KEY.chat .. ARGV[1]
check_type(about, 'hash')
check_type(KEY.chat_queue .. ARGV[1], 'list')
if call('EXISTS', about) == 1 then call('HSET', about, 'typing_ms', digits(math.floor(now_us / 1000))) end
return {digits(now_us), call('LLEN', KEY.chat_queue .. ARGV[1])}
